"""LARS and its kin, masks and schedules."""
