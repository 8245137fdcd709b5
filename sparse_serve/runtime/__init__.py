"""What every process shares: errors, child processes, facts of the machine, the cache of measurements."""
