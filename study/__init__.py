"""The registered study: plan, runner, finished run folders, statistics, plots, report."""
