"""The edit studio and the explorer: session, widgets, recipes, server."""
