"""A prompt, answers and messages that several tests rank."""

PROMPT = "How do I boil an egg?"
ANSWERS = ["Put it in boiling water.", "No.", "The quick brown fox", "It depends. Seven minutes, then cool it!"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
