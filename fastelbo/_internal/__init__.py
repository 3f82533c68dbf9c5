"""What the public modules share: the compiled ops, checks of arguments, ordered sums, progress bars."""
