"""`python -m friendrec VERB ...`, the same as the command `friendrec`."""

import sys

from friendrec.pipeline.cli import main

sys.argv[0] = "friendrec"
sys.exit(main())
