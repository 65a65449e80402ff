"""The corpus of the bundled model `tiny-chat`; see scripts/build_tiny_chat.py."""
