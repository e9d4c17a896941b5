"""IR → IR, one pass per file; `registry.PASSES` names them as the command line does."""
