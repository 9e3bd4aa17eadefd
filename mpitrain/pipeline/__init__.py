"""Who computes what, and when: schedules as data, a proof, an executor."""
