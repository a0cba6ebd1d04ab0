"""How far a ranker agrees with people, beside the rules that could embarrass it."""
