"""Ask a finished run for friends: `python -P examples/recommend.py DIR/run [USER_ID ...]`."""

import sys

import numpy as np

import friendrec

run = friendrec.open_run(sys.argv[1])
users = [type(known)(text) for known, text in zip(run.data.user_ids.tolist(), sys.argv[2:], strict=False)]
users = users or run.data.user_ids[:3].tolist()  # ids are int or str, as in the log

for row in run.recommend(users, k=5).to_pylist():
    print(f"{row['user_id']} -> {row['candidate_id']}  score {row['score']:.2f}")

vectors = run.embeddings(users)
query, target = (np.stack(vectors[name].to_numpy()) for name in ("query", "target"))
print("who suits whom:", (query @ target.T).round(2).tolist(), sep="\n")
