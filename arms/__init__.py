"""What an arm does beyond the loop of grpo.py: one short file each."""
