"""`python -m metateleport.cli`."""

from metateleport.cli.main import main

raise SystemExit(main())
