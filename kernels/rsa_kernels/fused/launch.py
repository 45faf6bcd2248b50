"""How the row kernels are launched: a table from kernel and risk to tile sizes and compiler options. Nothing runs here.

Sums depend on the tiles they are made of, so a launch depends on the options and the vocabulary only, never on how many
rows there are: a row gets the same bits in every batch.
"""

from typing import Any, Literal, NamedTuple, get_args

from rsa_kernels.pairs import RowOptions
from rsa_kernels.risk import ERM, KL, CVaR, RiskMeasure

Kind = Literal["none", "kl", "erm", "small_erm", "cvar"]
SMALL_MU = 0.1  # up to here log E exp(μ d), the logarithm of a number near 1, loses too many digits in fp32


class Block(NamedTuple):
    """`tile` vocabulary entries are in flight at once and are summed into `lanes` running sums.

    `registers` bounds those of a thread, on NVIDIA: unless told, the assembler spills some to fit one more program.
    The selection of CVaR has `tail_tile` entries in flight, and keeps 2K sums for each of them.
    """

    tile: int
    lanes: int
    threads: int
    registers: int | None
    tail_tile: int = 1024


# 8 running sums per thread and accumulator, 16 entries in flight; two programs fit a multiprocessor
STATISTICS: dict[Kind, Block] = dict.fromkeys(get_args(Kind), Block(4096, 2048, 256, 128))
STATISTICS["cvar"] = Block(2048, 1024, 256, 128)  # the search that follows needs registers of its own
STATISTICS["small_erm"] = Block(2048, 2048, 256, 128)  # its polynomials are long
# A cap takes registers, too: with larger tiles Triton 3.6 spills some.
CAPPED: dict[Kind, Block] = dict.fromkeys(get_args(Kind), Block(2048, 2048, 256, 128))
CAPPED["cvar"] = Block(1024, 1024, 256, 128, tail_tile=512)
GRADIENT = Block(2048, 2048, 128, None)
TAIL_THRESHOLDS = 8
# Rows of a vocabulary that is not a multiple of 16 may be read entry by entry: Triton 3.9 holds an address for each.
ALIGNED, UNALIGNED_TAIL_TILE = 16, 512


def kind(risk: RiskMeasure | None) -> Kind:
    """Which arithmetic a measure takes. The limits of both families are the KL, bit by bit."""
    match risk:
        case None:
            return "none"
        case KL() | CVaR(tail=1.0) | ERM(mu=0.0):
            return "kl"
        case CVaR():
            return "cvar"
        case ERM():
            return "small_erm" if abs(risk.mu) <= SMALL_MU else "erm"
    raise ValueError(f"no kernel knows the risk measure {risk}: use impl='chunked'")


def saved_count(risk: RiskMeasure | None) -> int:
    """Numbers per row from forward to backward: the log-normalisers, in fp32 and, packed in one, what that rounds away;
    then that of ERM's weights in two parts, or CVaR's threshold and the weight of outcomes that tie with it."""
    return {"none": 2, "kl": 3, "erm": 5, "small_erm": 5, "cvar": 5}[kind(risk)]


def statistics_launch(
    options: RowOptions, vocabulary: int, has_reference: bool, warp_size: int = 32
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `statistics_kernel`, pointers that are absent included, and options of its compilation."""
    risk = kind(options.risk)
    assert has_reference or risk == "none", f"{options.risk} compares with a reference"
    block = (CAPPED if _is_capped(options) else STATISTICS)[risk]
    lanes = min(block.lanes, _power_of_two(vocabulary))
    constants = _shared(options, vocabulary) | {
        "IGNORE_INDEX": options.ignore_index,
        "BLOCK_V": min(block.tile, lanes * _power_of_two(-(-vocabulary // lanes))),
        "LANES": lanes,
        "TAIL_BLOCK_V": min(
            _tail_tile(block, vocabulary), max(4, _power_of_two(vocabulary))
        ),  # lanes are summed by four
        "K": TAIL_THRESHOLDS,
    }
    absent = {"entropy_ptr": not options.entropy, "ref_logp_ptr": not has_reference, "r_ptr": not has_reference}
    absent |= {"risk_ptr": risk == "none", "kl_ptr": risk in ("none", "kl")}
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    return constants, _compiler(options, block, warp_size)


def gradient_launch(
    options: RowOptions, vocabulary: int, given: tuple[bool, bool, bool], warp_size: int = 32
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of `gradient_kernel`, where `given` tells which of the gradients of logp, risk and kl exist."""
    constants = _shared(options, vocabulary) | {"BLOCK_V": min(GRADIENT.tile, _power_of_two(vocabulary))}
    absent = {"g_logp_ptr": not given[0], "g_risk_ptr": not given[1], "g_kl_ptr": not given[2]}
    absent |= {"r_ptr": not (given[1] or given[2])}
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    return constants, _compiler(options, GRADIENT, warp_size)


def _shared(options: RowOptions, vocabulary: int) -> dict[str, Any]:
    risk = options.risk
    return {
        "V": vocabulary,
        "SAVED": saved_count(risk),
        "SCALE": options.scale,
        "SOFTCAP": options.softcap or 0.0,
        "REF_SCALE": options.ref_scale,
        "REF_SOFTCAP": options.ref_softcap or 0.0,
        "RISK": kind(risk),
        "MU": risk.mu if isinstance(risk, ERM) else 0.0,
        "TAIL": risk.tail if isinstance(risk, CVaR) else 1.0,
    }


def _compiler(options: RowOptions, block: Block, warp_size: int) -> dict[str, Any]:
    """Forward and backward of CVaR compare x = r − z bitwise, so neither may fuse the products that z and r end in."""
    plain = options.scale == options.ref_scale == 1.0 and not _is_capped(options)
    compiler: dict[str, Any] = {"num_warps": block.threads // warp_size, "num_stages": 1, "enable_fp_fusion": plain}
    return compiler | ({} if block.registers is None or warp_size != 32 else {"maxnreg": block.registers})


def _tail_tile(block: Block, vocabulary: int) -> int:
    return block.tail_tile if vocabulary % ALIGNED == 0 else min(block.tail_tile, UNALIGNED_TAIL_TILE)


def _is_capped(options: RowOptions) -> bool:
    return options.softcap is not None or options.ref_softcap is not None


def _power_of_two(count: int) -> int:
    """The smallest one that is not below `count`."""
    return 1 << (count - 1).bit_length()
