"""The target that needs nothing: the engine is IR text, and the interpreter runs it."""
