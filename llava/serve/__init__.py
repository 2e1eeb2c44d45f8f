"""Talking to a model: `engine` answers dialogues about pictures, `cli` is the terminal."""
