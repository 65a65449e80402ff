"""Conversations as tokens: `Conversation` -> `Template` -> ids and loss mask, the same for training and for serving."""

from __future__ import annotations

from swiftlite.chat.conversation import Conversation, Message
from swiftlite.chat.template import Encoded, Template

__all__ = ["Conversation", "Encoded", "Message", "Template"]
