"""The `fastelbo` command: an application of the library, which imports nothing of it."""
