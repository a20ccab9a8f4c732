"""Programs that a model wrote, run against tests without touching the machine and without a say in the verdict."""
