"""What pruners share: budgets, ranks and masks."""
