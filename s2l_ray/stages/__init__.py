"""The only code that talks to Ray: one file per kind of artifact."""
