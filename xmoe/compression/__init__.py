"""Watch, judge, decide, act: fewer or smaller experts, with proof of what changed."""
