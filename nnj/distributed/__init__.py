"""What several processes tell one another: agreement, sums, and what one makes of what all have."""
