"""Flags: their definition (`concerns`), their other names (`aliases`), parsing (`parse`) and inheritance (`resolve`)."""
