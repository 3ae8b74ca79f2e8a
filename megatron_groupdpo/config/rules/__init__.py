"""What fields must be together, a file per subject. Every message states the rule, the values and the way out."""
