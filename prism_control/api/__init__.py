"""What users and agents call: one file a service; validate, propose, reply."""
