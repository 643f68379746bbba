"""``python -m labinfer`` is the ``labinfer`` command."""

import sys

from labinfer.cli.main import main

sys.exit(main())
