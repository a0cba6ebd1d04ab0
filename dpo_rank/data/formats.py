import hashlib, json
def held_out(prompt, share=0.05):
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    key = json.dumps([[turn["role"], turn["content"]] for turn in turns], ensure_ascii=False)
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
