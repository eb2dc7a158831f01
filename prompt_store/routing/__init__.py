"""Who answers a task: routes with their history, the backends they name, and what is known of their answers."""
