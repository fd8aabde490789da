"""What a user would write without ddmlib, plainly; the same mathematics and the same networks."""
