"""What forgetting costs: any localizer with any editor at equal budgets, and the area under what can be had."""
