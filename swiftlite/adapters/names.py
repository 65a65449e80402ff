"""What an adapter may be called: a request names it as its model, a folder in --adapter_dir is named so."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
NAME_RULE = "use letters, digits and . _ : @ -"
