"""The reference on disk: it says what a live one says, is made once and in parts, and is refused where it is not this one."""

import dataclasses
import json
import logging
import re
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from processes import on_ranks
from rsa_kernels import ERM, KL, CVaR

from rsa_lightning import hidden_store
from rsa_lightning.adapters import Lora
from rsa_lightning.cli import main
from rsa_lightning.data.batch import EncodedPair, collate
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.hidden_cache import HiddenCache, Ids, Rows, rows_of
from rsa_lightning.hidden_store import HiddenStore, Layout
from rsa_lightning.losses import DPO, IPO, KTO, RSA, TDPO
from rsa_lightning.models import PolicySpec, load_policy
from rsa_lightning.parallel.processes import gathered
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.reference import AdapterOff, FrozenCopy
from rsa_lightning.saving import save_policy
from rsa_lightning.scoring import Scoring, chosen_batch
from rsa_lightning.stages import RewardAlignment, SafetyAlignment

ROOT = Path(__file__).parents[1]
WORDS = "fox owl river bread cloth place answer human cool dry old safe sleep cross".split()
METHODS = {
    "DPO": (DPO(beta=0.1), KL()),
    "TDPO": (TDPO(beta=0.1), KL()),
    "RSA CVaR(0.97)": (RSA(beta=0.1), CVaR(0.97)),
    "RSA CVaR(0.1)": (RSA(beta=0.1), CVaR(0.1)),
    "RSA ERM": (RSA(beta=0.1), ERM(5.0)),
}
LOW = 5e-3
CHUNK = 16  # rows of a chunk here: the 80 rows of `pairs` are five chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(hidden_store, "CHUNK_ROWS", CHUNK)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(40)))
    return path


def pair(i: int) -> dict[str, str]:
    chosen, rejected = " ".join(WORDS[: i % 5 + 1]), f"{WORDS[(3 * i) % 14]} {i}"
    return {"prompt": f"Q{i} {WORDS[i % 14]}?", "chosen": f" {chosen} {i}.", "rejected": f" {rejected}"}


class Losses(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def fit(
    pairs,
    spec,
    reference,
    method="DPO",
    *,
    steps=4,
    stage=RewardAlignment,
    ckpt_path=None,
    data=None,
    callbacks=(),
    **options,
):
    """(losses of the steps, the stage, its trainer), after a validation at the end."""
    loss, risk = METHODS[method] if isinstance(method, str) else method
    module = stage(spec, loss=loss, risk=risk, reference=reference, optimizer=partial(torch.optim.SGD, lr=0.5))
    losses = Losses()
    defaults = {
        "val_check_interval": steps or None,
        **{"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        **{"enable_checkpointing": False, "enable_model_summary": False, "use_distributed_sampler": False},
        **{"num_sanity_val_steps": 0, "callbacks": [losses, *callbacks], "default_root_dir": pairs.parent},
    }
    trainer = L.Trainer(**defaults | options)
    settings = {"batch_size": 4, "max_length": 64, "cache_dir": str(pairs.parent / "tokens")} | (data or {})
    trainer.fit(module, PreferenceData(str(pairs), **settings), ckpt_path=ckpt_path)
    return losses.seen, module, trainer


def model(tiny_llama, **options):
    return PolicySpec(model=str(tiny_llama), **options)


def chunks(folder: Path) -> dict[str, int]:
    """Chunk file -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.rglob("0*.safetensors"))}


def only(folder: Path) -> Path:
    """The one cache below a folder."""
    (found,) = [path for path in folder.iterdir() if path.is_dir()]
    return found


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of caches that tests fill, each with what it needs."""
    return tmp_path_factory.mktemp("made")


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_a_live_copy(method, tiny_llama, pairs, made):
    live, before, one = fit(pairs, model(tiny_llama), FrozenCopy(), method)
    cached, after, other = fit(pairs, model(tiny_llama), HiddenCache(str(made)), method)
    assert max(live) - min(live) > 1e-2  # the policy has moved: the reference matters
    assert cached == pytest.approx(live, rel=0, abs=1e-6)
    for mine, theirs in zip(before.policy.parameters(), after.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert set(one.callback_metrics) == set(other.callback_metrics) >= {"val/kl/chosen", "val/risk/chosen"}
    for name, value in one.callback_metrics.items():
        assert other.callback_metrics[name].item() == pytest.approx(value.item(), abs=2e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_with_an_adapter_all_three_references_are_one(method, tiny_llama, pairs, made):
    pytest.importorskip("peft")
    spec = model(tiny_llama, lora=Lora(rank=4))
    references = [AdapterOff(), FrozenCopy(), HiddenCache(str(made / "lora"))]
    off, copied, cached = (fit(pairs, spec, reference, method)[0] for reference in references)
    assert max(off) - min(off) > 1e-3
    assert copied == pytest.approx(off, rel=0, abs=1e-6)
    assert cached == pytest.approx(off, rel=0, abs=1e-6)
    assert references[2]._head == {}  # the policy's own is frozen
    assert not list(made.glob("lora/*/head-*"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_kept_as_it_was(tied, tiny_tokenizer, pairs, tmp_path):
    """A trained head moves, tied to the embeddings or not; that of the reference does not. A fresh model has no files."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", **shape, "initializer_range": 0.2, "tie_word_embeddings": tied}
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = PolicySpec(config=config, tokenizer=str(tmp_path / "tokenizer"))
    live, cached = (
        fit(pairs, spec, reference, "RSA CVaR(0.97)") for reference in (FrozenCopy(), HiddenCache(str(tmp_path / "c")))
    )
    assert cached[0] == pytest.approx(live[0], rel=0, abs=1e-6)
    reference, head = cached[1].reference, cached[1].policy.head
    assert torch.equal(reference._head["weight"], live[1].reference._policy.head.weight)
    assert (reference._head["weight"] - head.weight).abs().max() > 1e-3


def test_the_head_keeps_its_soft_cap_and_scale(tiny_tokenizer, pairs, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    config = {"model_type": "gemma2", **shape, "final_logit_softcapping": 3.0}
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = PolicySpec(config=config, tokenizer=str(tmp_path / "tokenizer"))
    live, cached = (
        fit(pairs, spec, reference, "TDPO")[0] for reference in (FrozenCopy(), HiddenCache(str(tmp_path / "c")))
    )
    assert cached == pytest.approx(live, rel=0, abs=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_low_precision_states_are_kept_as_the_head_reads_them(precision, tiny_llama, pairs, tmp_path):
    """In bfloat16, whether of weights or of autocast; and losses differ by the rounding of other batches only."""
    if precision == "32-true":
        pytest.importorskip("peft")
        spec, live = model(tiny_llama, dtype="bfloat16", lora=Lora(rank=4)), AdapterOff()
    else:
        spec, live = model(tiny_llama), FrozenCopy()
    expected = fit(pairs, spec, live, "RSA CVaR(0.97)", precision=precision)[0]
    cached, module, _ = fit(pairs, spec, HiddenCache(str(tmp_path)), "RSA CVaR(0.97)", precision=precision)
    assert module.reference._store.layout.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in module.reference._head.values()} <= {torch.bfloat16}
    assert cached == pytest.approx(expected, rel=0, abs=LOW)


def test_log_probabilities_alone_give_the_loss_of_dpo(tiny_llama, pairs, tmp_path):
    live, _, one = fit(pairs, model(tiny_llama), FrozenCopy(), "DPO")
    cached, module, other = fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path), keep="logps"), "DPO")
    assert cached == pytest.approx(live, rel=0, abs=1e-6)
    unmeasured = {f"val/{name}/{side}" for name in ("kl", "risk") for side in ("chosen", "rejected")}
    assert set(one.callback_metrics) - set(other.callback_metrics) == unmeasured
    tokens = int(module.reference._store.layout.tokens.sum())
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert written < 4 * tokens + 80 * 16 + 5 * 200  # four bytes a token, a key a row, a header a chunk; no head


def test_padding_and_order_do_not_matter(tiny_llama, tiny_tokenizer, pairs, made):
    """The values of a row are those that the policy as it started gives it, in whatever batch it comes."""
    _, module, _ = fit(pairs, model(tiny_llama), HiddenCache(str(made)), "DPO")
    examples = module.trainer.datamodule.train_examples
    fresh = load_policy(model(tiny_llama)).eval()
    some = [examples[i] for i in (7, 2, 30)]
    sides = [collate(some, padding_side=side) for side in ("right", "left")]
    right, left = (module.reference.states(batch).hidden for batch in sides)
    assert torch.equal(right, left)
    for batch in (*sides, collate(examples[2:3])):
        torch.testing.assert_close(module.reference.states(batch).hidden, fresh.states(batch), rtol=0, atol=1e-5)


def test_states_are_where_the_batch_is(tiny_llama, tiny_tokenizer, pairs, tmp_path):
    """Not where the weights lie: a GPU computes with those that `cpu_offload` keeps on the host."""
    policy, work = rows_and_work(tiny_llama, tiny_tokenizer, pairs)
    cache = HiddenCache(str(tmp_path))
    cache.fill(policy, lambda: work)
    cache.place(policy.to("meta"))  # elsewhere
    states = cache.states(collate([work.sides["train"][0]]))
    assert (states.hidden.device.type, states.weight.device.type) == ("cpu", "cpu")


def test_rows_are_told_apart_by_ids_and_prompt_length():
    def keys(*examples, side="right"):
        return [row.key for row in rows_of(collate(examples, padding_side=side, pad_id=2))]

    one, two = EncodedPair([5, 6], [7, 2], [8]), EncodedPair([1, 2, 3, 4], [9], [7, 2, 2])
    assert keys(one, two) == keys(one, two, side="left")  # 2 pads, and is a token too
    assert sorted(keys(one) + keys(two)) == sorted(keys(one, two))
    shifted = EncodedPair([5], [6, 7, 2], [6, 8])  # the same ids, split elsewhere
    assert not set(keys(one)) & set(keys(shifted))
    assert len({*keys(one, two), *keys(shifted)}) == 6
    batch = collate([one, two])
    assert [(row.ids.tolist(), row.prompt) for row in rows_of(batch)][2] == ([5, 6, 8], 2)


# ---- how it is made --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No Exception: nothing of ours may catch it."""


def killed_after(monkeypatch, count):
    """Lets a store write `count` chunks, then die while it writes the next."""
    whole, written = HiddenStore.write, []

    def write(self, chunk, values):
        if len(written) == count:
            (self.folder / f"{chunk:05d}.partial").write_bytes(b"half a chunk")
            raise Killed
        written.append(chunk)
        whole(self, chunk, values)

    monkeypatch.setattr(HiddenStore, "write", write)


def test_a_killed_build_goes_on_after_its_last_chunk(tiny_llama, pairs, tmp_path, caplog):
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path / "killed")))
    before = chunks(tmp_path)
    assert [name[:5] for name in before] == ["00000", "00001"]
    with caplog.at_level(logging.INFO, "rsa_lightning"):
        losses = fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path / "killed")))[0]
    assert "computing 48 of 80 rows (first: " in caplog.text
    after = chunks(tmp_path / "killed")
    assert {name: after[name] for name in before} == before
    assert len(after) == 5
    assert not list(tmp_path.rglob("*.partial"))
    assert losses == fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path / "whole")))[0]
    assert list(after) == list(chunks(tmp_path / "whole"))  # names hold the hashes
    caplog.clear()
    fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path / "killed"), build=False))
    assert "computing" not in caplog.text
    assert chunks(tmp_path / "killed") == after


def test_missing_rows_are_an_error_where_nothing_may_be_built(tiny_llama, pairs, tmp_path):
    with pytest.raises(
        ValueError, match=r"lacks 80 of 80 rows \(first: .*pairs.jsonl:\d+ \(chosen\), .*build is false"
    ):
        fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path / "c"), build=False))
    assert not (tmp_path / "c").exists()


def test_a_row_that_is_not_in_the_data_is_named(tiny_llama, pairs, made):
    _, module, _ = fit(pairs, model(tiny_llama), HiddenCache(str(made)))
    known = module.trainer.datamodule.train_examples[3]
    batch = collate([known, known._replace(chosen=[9, 9, 9], row_id="foreign:7")])
    with pytest.raises(ValueError, match=r"has not 1 of a batch's 4 rows \(foreign:7 \(chosen\)\): take FrozenCopy"):
        module.reference.states(batch)


def test_a_resumed_stage_does_not_take_its_policy_for_the_reference(tiny_llama, pairs, tmp_path):
    """It goes on with a whole cache; an incomplete one is completed from the start, with no step of training."""
    spec, folder = model(tiny_llama), str(tmp_path / "c")
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(pairs, spec, HiddenCache(folder), "TDPO", steps=6, callbacks=[saving], enable_checkpointing=True)[0]
    first, checkpoint = whole[:3], tmp_path / "step=3.ckpt"
    resume = partial(fit, pairs, spec, method="TDPO", steps=6, ckpt_path=checkpoint)
    assert first + resume(HiddenCache(folder))[0] == whole
    (lost,) = tmp_path.rglob("00002-*")
    lost.unlink()
    with pytest.raises(ValueError, match=r"lacks 16 of 80 rows .*no ckpt_path and --trainer.max_steps 0"):
        resume(HiddenCache(folder))
    assert fit(pairs, spec, HiddenCache(folder), "TDPO", steps=0)[0] == []
    assert lost.exists()
    assert first + resume(HiddenCache(folder))[0] == whole


def rows_and_work(tiny_llama, tiny_tokenizer, pairs, **options):
    """A policy and the Scoring of some rows of uneven lengths, without a trainer."""
    data = PreferenceData(str(pairs), tokenizer=str(tiny_llama), cache_dir=None, max_length=64)
    data.setup()
    policy = load_policy(model(tiny_llama))
    make = partial(chosen_batch, "right", 0, policy.head.weight.device)
    sides = {"train": data.train_examples, "validation": data.validation_examples}
    return policy, Scoring(sides, make, batch_rows=8, decided_by=lambda: {"test": 1}, **options)


class Forwards:
    """Counts the forward passes of a policy."""

    def __init__(self, policy):
        self.count, self._states = 0, policy.states
        policy.states = self

    def __call__(self, batch):
        self.count += 1
        return self._states(batch)


def test_two_writers_make_what_one_makes(tiny_llama, tiny_tokenizer, pairs, tmp_path):
    """Three of the five chunks each for the first, two for the second; and as many forward passes."""
    policy, work = rows_and_work(tiny_llama, tiny_tokenizer, pairs)
    rows = Rows.of(work.sides)
    layout = Layout(rows.keys, rows.tokens, (32,), torch.float32)
    assert [len(chunk) for chunk in layout.chunks] == [16] * 5
    one, two = (HiddenStore(tmp_path / name, layout, {}) for name in ("one", "two"))
    for store, worlds in ((one, 1), (two, 2)):
        store.check_writable()
        counts = []
        for rank in range(worlds):
            cache, mine = HiddenCache(str(tmp_path)), dataclasses.replace(work, rank=rank, world_size=worlds)
            forwards = Forwards(policy)
            cache._make(store, rows, policy, mine, list(range(5)), head=rank == 0)
            policy.states = forwards._states
            counts.append(forwards.count)
            assert len(chunks(store.folder)) == (5 if worlds == 1 else (3, 5)[rank])
        assert counts == ([10] if worlds == 1 else [6, 6])
    assert list(chunks(tmp_path / "one")) == list(chunks(tmp_path / "two"))
    assert [p.name for p in one.folder.glob("head-*")] == [p.name for p in two.folder.glob("head-*")]


def test_two_processes_share_the_work_and_the_errors(tiny_llama, tiny_tokenizer, pairs, tmp_path):
    """Both read what either wrote; and where one finds that a file cannot be written or read, neither waits."""
    (tmp_path / "file").write_text("no folder")

    def both(rank):
        policy, work = rows_and_work(tiny_llama, tiny_tokenizer, pairs, rank=rank, world_size=2, gather=gathered)
        cache = HiddenCache(str(tmp_path / "two"))
        cache.fill(policy, lambda: work)
        batch = collate([work.sides["train"][rank]])
        with pytest.raises(ValueError, match="cannot be written"):
            HiddenCache(str(tmp_path / "file/no folder")).fill(policy, lambda: work)
        if rank == 1:  # a forked process
            HiddenStore._check_bytes = spoilt
        with pytest.raises(ValueError, match="bytes that the second looks at"):
            HiddenCache(str(tmp_path / "two")).fill(policy, lambda: work)
        return cache.states(batch).hidden, policy.states(batch).detach()

    def spoilt(store, part):
        raise ValueError("bytes that the second looks at")

    found = on_ranks(2, both)
    policy, work = rows_and_work(tiny_llama, tiny_tokenizer, pairs)
    HiddenCache(str(tmp_path / "one")).fill(policy, lambda: work)
    assert list(chunks(tmp_path / "two")) == list(chunks(tmp_path / "one"))
    for cached, computed in found:
        torch.testing.assert_close(cached, computed, rtol=0, atol=1e-5)


def test_processes_that_share_matrices_score_the_same_rows(tiny_llama, pairs, tmp_path):
    """Tensor parallelism: every forward pass is one of both processes, so both take the same chunks; one writes them."""

    def shared(rank):
        options = {"devices": 2, "strategy": FSDP2(tensor_parallel=2)}
        return fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path / "c")), "TDPO", **options)[0]

    live = fit(pairs, model(tiny_llama), FrozenCopy(), "TDPO")[0]
    assert on_ranks(2, shared) == [pytest.approx(live, abs=1e-5)] * 2
    assert len(chunks(tmp_path)) == 5


def test_a_folder_that_cannot_be_written_is_refused_before_any_forward_pass(
    tiny_llama, tiny_tokenizer, pairs, tmp_path
):
    policy, work = rows_and_work(tiny_llama, tiny_tokenizer, pairs)
    forwards = Forwards(policy)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="lacks rows and cannot be written"):
        HiddenCache(str(tmp_path / "file/below")).fill(policy, lambda: work)
    with pytest.MonkeyPatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(ValueError, match=r"needs 0.00 GiB more, and its disk has 0.00 GiB free: free some"):
            HiddenCache(str(tmp_path / "full")).fill(policy, lambda: work)
    assert forwards.count == 0


def test_chunks_end_at_a_number_of_rows_or_of_bytes(monkeypatch):
    monkeypatch.setattr(hidden_store, "CHUNK_ROWS", 3)
    monkeypatch.setattr(hidden_store, "CHUNK_BYTES", 80)
    tokens = torch.tensor([1, 1, 1, 1, 9, 30, 2, 5, 4]).numpy()
    layout = Layout([bytes([i] * 16) for i in range(9)], tokens, (2,), torch.float32)  # 8 bytes a token
    assert [list(chunk) for chunk in layout.chunks] == [[0, 1, 2], [3, 4], [5], [6, 7], [8]]
    assert [layout.size(chunk) for chunk in range(5)] == [3, 10, 30, 7, 4]
    assert [layout.place(key) for key in layout.keys[3:5]] == [(1, 0, 1), (1, 1, 10)]
    assert layout.place(bytes(15) + b"x") is None


def test_rows_that_repeat_are_kept_once():
    examples = [EncodedPair([1], [2, 3], [4]), EncodedPair([1], [4], [5]), EncodedPair([1], [], [2, 3])]
    rows = Rows.of({"train": examples, "validation": examples[:1]})
    assert rows.places == [("train", 0, "chosen"), ("train", 0, "rejected"), ("train", 1, "rejected")]
    assert rows.tokens.tolist() == [2, 1, 1]
    assert rows.keys[0] == Ids(torch.tensor([1, 2, 3]).numpy(), 1).key


# ---- what it is of ---------------------------------------------------------------------------------------------------


def changed_model(tiny_llama, tiny_tokenizer, folder):
    policy = load_policy(model(tiny_llama))
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    save_policy(policy, tiny_tokenizer, folder)
    return PolicySpec(model=str(folder))


def test_another_model_other_data_lengths_or_precision_have_other_folders(tiny_llama, tiny_tokenizer, pairs, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(1, 41)))
    spec = model(tiny_llama)

    def folders(*arguments, keep="hidden", **options):
        fit(*arguments, reference=HiddenCache(str(tmp_path / "c"), keep=keep), steps=0, **options)
        return len([path for path in (tmp_path / "c").iterdir() if path.is_dir()])

    assert folders(pairs, spec) == 1
    assert folders(pairs, spec) == 1
    assert folders(pairs, spec, data={"padding_side": "left", "batch_size": 2}) == 1  # they change no result
    assert folders(pairs, changed_model(tiny_llama, tiny_tokenizer, tmp_path / "model")) == 2
    assert folders(other, spec) == 3
    assert folders(pairs, spec, data={"max_length": 60}) == 4  # nothing is cut by either
    assert folders(pairs, spec, data={"template": "chatml"}) == 5
    assert folders(pairs, model(tiny_llama, dtype="bfloat16")) == 6
    assert folders(pairs, spec, precision="bf16-mixed") == 7
    assert folders(pairs, spec, keep="logps") == 8
    manifest = json.loads((only_of(tmp_path / "c", "bf16-mixed") / "manifest.json").read_text())
    assert manifest["what"].startswith("last hidden states of every response token, by the model that a stage starts")
    assert manifest["about"] == {"model": str(tiny_llama), "data": [str(pairs)], "template": None}
    assert manifest["sizes"]["rows"] == 80
    assert set(manifest["of"]["model"]) == {"config.json", "model.safetensors"}
    assert manifest["of"]["hidden_size"] == 32


def only_of(folder: Path, precision: str) -> Path:
    """The cache of this precision."""
    manifests = list(folder.glob("*/manifest.json"))
    (found,) = [path for path in manifests if json.loads(path.read_text())["of"]["precision"] == precision]
    return found.parent


@pytest.fixture
def cached(tiny_llama, pairs, tmp_path):
    """The folder of a finished cache, and a function that trains with it."""
    again = partial(fit, pairs, model(tiny_llama))
    again(HiddenCache(str(tmp_path / "c")), steps=0)
    return only(tmp_path / "c"), lambda: again(HiddenCache(str(tmp_path / "c")))


def test_a_flipped_byte_is_found(cached):
    folder, again = cached
    for path in [*folder.glob("00003-*"), *folder.glob("head-*")]:
        good = path.read_bytes()
        path.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
        with pytest.raises(
            ValueError, match=rf"{path} does not hold the bytes that were written: delete the folder {folder}"
        ):
            again()
        path.write_bytes(good)
    again()


def test_the_size_of_every_chunk_is_compared(cached, monkeypatch):
    folder, again = cached
    monkeypatch.setattr(hidden_store, "HASHED_CHUNKS", 0)
    (path,) = folder.glob("00003-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00003-.* cannot be read .*: delete the folder"):
        again()


def test_chunks_of_other_rows_are_found(cached):
    folder, again = cached
    first, second = (next(folder.glob(f"{chunk}-*")) for chunk in ("00000", "00001"))
    first.rename(folder / first.name.replace("00000", "00001"))
    second.rename(folder / second.name.replace("00001", "00000"))
    with pytest.raises(ValueError, match=r"0000\d-.* (is of other rows|and its rows have .*): delete the folder"):
        again()


def test_a_cache_of_another_model_under_this_name_is_found(cached, tiny_llama, tiny_tokenizer, pairs, tmp_path):
    """Rows are computed again before the first update, whatever names and manifests say."""
    folder, again = cached
    fit(
        pairs,
        changed_far(tiny_llama, tiny_tokenizer, tmp_path / "model"),
        HiddenCache(str(tmp_path / "other")),
        steps=0,
    )
    for path in folder.glob("*-*"):
        path.unlink()
    for path in only(tmp_path / "other").glob("*-*"):
        shutil.copy(path, folder)
    with pytest.raises(
        ValueError, match=r"computed again \(8 of 80 rows .*, differ by .*: it was not made with this policy"
    ):
        again()


def changed_far(tiny_llama, tiny_tokenizer, folder):
    policy = load_policy(model(tiny_llama))
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    save_policy(policy, tiny_tokenizer, folder)
    return PolicySpec(model=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["of"].update(dtype="float16"), r"is of something else .* \(its dtype differ\): delete the folder"),
        (lambda m: m["sizes"].update(rows=79), r"\(its rows differ\)"),
        (lambda m: m.pop("of"), r"cannot be read \('of'\): delete the folder"),
    ],
    ids=["identity", "sizes", "damaged"],
)
def test_a_manifest_that_contradicts_is_an_error(cached, change, message):
    folder, again = cached
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        again()


# ---- what it is for --------------------------------------------------------------------------------------------------


def test_a_folder_that_is_none_or_one_cache_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for given in ("", str(tmp_path / "file")):
        with pytest.raises(ValueError, match="keeps files in a folder, and .* is none"):
            HiddenCache(given)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(
        ValueError, match="is a single cache or a run itself .*: give a folder of caches, as its parent"
    ):
        HiddenCache(str(tmp_path))


@pytest.mark.parametrize("loss", [TDPO(), RSA(), RSA(risk_weight=0.1)], ids=str)
def test_losses_of_the_distribution_need_hidden_states(loss, tmp_path):
    spec, reference = PolicySpec(config={"model_type": "llama"}), HiddenCache(str(tmp_path), keep="logps")
    with pytest.raises(
        ValueError, match=rf"{type(loss).__name__} reads the reference's distribution.* set keep=hidden"
    ):
        RewardAlignment(spec, loss=loss, risk=KL(), reference=reference)


@pytest.mark.parametrize("loss", [DPO(), IPO(), RSA(risk_weight=0.0)], ids=str)
def test_losses_that_read_no_risk_do_not(loss, tmp_path):
    spec, reference = PolicySpec(config={"model_type": "llama"}), HiddenCache(str(tmp_path), keep="logps")
    assert not RewardAlignment(spec, loss=loss, reference=reference).reference.knows_distribution


@pytest.mark.parametrize("keep", ["hidden", "logps"])
def test_mismatched_rows_cannot_be_kept(keep, tmp_path):
    spec, reference = PolicySpec(config={"model_type": "llama"}), HiddenCache(str(tmp_path), keep=keep)
    with pytest.raises(ValueError, match="KTO scores prompts with responses of other examples.* take FrozenCopy"):
        SafetyAlignment(spec, loss=KTO(), reference=reference)


def test_what_is_kept_has_two_names(tmp_path):
    with pytest.raises(ValueError, match="keeps hidden or logps, got keep='logits'"):
        HiddenCache(str(tmp_path), keep="logits")


def test_loaders_alone_do_not_say_which_rows_there_are(tiny_llama, tiny_tokenizer, tmp_path):
    module = RewardAlignment(model(tiny_llama), loss=DPO(), reference=HiddenCache(str(tmp_path)))
    loader = torch.utils.data.DataLoader([EncodedPair([1], [2], [3])], collate_fn=collate)
    trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=1, enable_checkpointing=False)
    with pytest.raises(ValueError, match="needs to know all rows: give the trainer a PreferenceData"):
        trainer.fit(module, loader)


def test_an_evaluation_reads_and_never_builds(tiny_llama, pairs, tmp_path):
    def validate(reference, **options):
        module = RewardAlignment(model(tiny_llama), loss=DPO(), reference=reference)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        data = PreferenceData(str(pairs), batch_size=4, max_length=64, cache_dir=str(pairs.parent / "tokens"))
        return trainer.validate(module, data, verbose=False, **options)[0]

    with pytest.raises(ValueError, match="is resumed or evaluated"):
        validate(HiddenCache(str(tmp_path / "c")))
    trainer = fit(pairs, model(tiny_llama), HiddenCache(str(tmp_path / "c")))[2]
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    cached, live = (
        validate(reference, ckpt_path=tmp_path / "trained.ckpt")
        for reference in (HiddenCache(str(tmp_path / "c")), FrozenCopy(str(tiny_llama)))
    )
    assert cached == pytest.approx(live, abs=1e-5)
    assert live["val/rewards/margins"] != 0


def run(command, *options):
    return main([command, *map(str, options)])


def fit_options(tiny_llama, pairs, tmp_path):
    """`rsa fit` of a tiny model for three steps, reference in the YAML."""
    layer = tmp_path / "layer.yaml"
    folder = json.dumps(str(tmp_path / "c"))
    layer.write_text(
        f"model: {{init_args: {{reference: {{class_path: HiddenCache, init_args: {{folder: {folder}}}}}}}}}\n"
        "trainer: {max_steps: 3, limit_val_batches: 1, callbacks: [], enable_progress_bar: false, accelerator: cpu, "
        f"logger: false, enable_checkpointing: false, default_root_dir: {json.dumps(str(tmp_path))}}}\n"
    )
    files = ["-c", ROOT / "configs/safety.yaml", "-c", layer, "--data.path", pairs, "--data.max_length", "64"]
    return ["fit", *files, "--model.policy.model", tiny_llama]


def test_rsa_fit_takes_it_by_its_name(tiny_llama, pairs, tmp_path, capsys):
    options = fit_options(tiny_llama, pairs, tmp_path)
    assert run(*options) == 0
    assert len(chunks(tmp_path / "c")) == 5
    assert run(*options, "--model.loss", "KTO") == 1
    assert "KTO scores prompts with responses of other examples" in capsys.readouterr().err
    assert run(*options, "--model.reference.keep", "logps") == 1
    assert "RSA reads the reference's distribution" in capsys.readouterr().err
    assert run(*options, "--model.reference.keep", "everything") == 1
    assert "everything" in capsys.readouterr().err


SMALL = """
trainer: {max_steps: 3, limit_val_batches: 1, log_every_n_steps: 1}
model: {config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}}
data: {stories: {demonstrations: 24, pairs: 24}, options: {batch_size: 4, tokenizer_vocab_size: 300}}
evaluation: {prompts: 2, pairs: 0, resamples: 2, figures: false, sampling: {samples_per_prompt: 1, max_new_tokens: 4}}
steps:
  warmup: {trainer: {max_epochs: 1}}
"""


def test_steps_of_rsa_align_keep_their_references(tmp_path, capsys):
    """Both steps of a story world; the models are those of a run with live references, which may then be reused."""
    (tmp_path / "small.yaml").write_text(SMALL)
    files = ["-c", ROOT / "configs/quickstart.yaml", "-c", tmp_path / "small.yaml", "--output"]
    folder = tmp_path / "references"
    cached = ["--steps.reward.reference_cache", folder, "--steps.safety.reference_cache.folder", folder]
    assert run("align", *files, tmp_path / "cached", *cached) == 0
    assert run("align", *files, tmp_path / "live") == 0
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2
    for step in ("reward", "safety"):
        mine, theirs = (
            load_policy(PolicySpec(model=str(tmp_path / name / step / "model"))) for name in ("cached", "live")
        )
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    written = (tmp_path / "cached/reward/config.yaml").read_text()
    assert "rsa_lightning.hidden_cache.HiddenCache" in written
    capsys.readouterr()
    assert run("align", *files, tmp_path / "cached") == 0
    assert capsys.readouterr().out.count("reused") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps.warmup.reference_cache", "c"], "steps.warmup.reference_cache: a warm-up has none"),
        (
            ["--steps.safety.reference_cache", "c", "--steps.safety.reference", "base"],
            "steps.safety: reference_cache is of the model that the step starts from, reward, and reference names base",
        ),
        (
            ["--steps.safety.reference_cache", "c", "--steps.safety.loss", "KTO"],
            "steps.safety: .*KTO scores prompts with responses of other examples",
        ),
        (["--steps.safety.reference_cache", "true"], "steps.safety.reference_cache must be a name or a mapping"),
        (["--steps.safety.reference_cache.fodler", "c"], "steps.safety: .*fodler"),
    ],
    ids=["warm-up", "reference", "KTO", "shape", "typo"],
)
def test_steps_that_cannot_keep_theirs_are_refused_at_once(options, message, tmp_path, capsys):
    assert run("align", "-c", ROOT / "configs/quickstart.yaml", "--output", tmp_path / "run", *options) == 1
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()
