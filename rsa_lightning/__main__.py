"""`python -m rsa_lightning` is the `rsa` command."""

import sys

from rsa_lightning.cli import main

sys.exit(main())
