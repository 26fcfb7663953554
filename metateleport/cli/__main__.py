"""`python -m metateleport.cli`."""

from metateleport.cli import main

raise SystemExit(main())
