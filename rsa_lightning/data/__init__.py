"""Preference data: files -> pairs (`formats`, `readers`) -> token batches (`tokenize`) -> loaders (`datamodule`)."""
