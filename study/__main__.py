"""`python -m study`: see runner.py."""

import sys

from study.runner import main

sys.exit(main())
