"""The benchmark: methods, protocol, leaderboard, records."""
