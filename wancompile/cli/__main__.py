"""`python -m wancompile.cli`."""

import sys

from wancompile.cli.entry import main

sys.exit(main())
