"""The configuration: schema, reading, checking, writing. Nothing in here imports torch."""
