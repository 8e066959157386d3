"""`python3 -m dlmfs`."""

import sys

from dlmfs.cli.main import main

sys.exit(main())
