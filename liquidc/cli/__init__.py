"""The command line: one file a verb. Verbs are imported when they are called."""
