"""Identity data: a persona, dialogues from phrases, dialogues from an endpoint."""
