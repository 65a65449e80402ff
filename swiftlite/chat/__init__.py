"""Conversations as tokens: `Conversation` -> `Template` -> ids and loss mask, the same for training and for serving."""
