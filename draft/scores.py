import sys, pandas as pd
from benchmark.experiments import *
from benchmark.measurements import *
from benchmark.intervals import iqm, clearly_better, difference
seeds=[int(x) for x in sys.argv[1:]] or list(TEN)
plan=[x for x in EXPERIMENTS["staleness"]() if x.flags["seed"] in seeds]
t=measure(plan).dropna(subset="value")
one=t[(t.line=="PPO-clip")&(t.buffer_epochs==1)].groupby("env_id").value.mean()
z=random_actions()
print(one.to_dict())
t["score"]=(t.value-t.env_id.map(z))/(t.env_id.map(one)-t.env_id.map(z))
print(t.pivot_table("score",["line"],["buffer_epochs"],aggfunc=lambda v:f"{iqm(v.to_numpy()):.2f} ({len(v)})",sort=False).to_string())
print(t.pivot_table("value",["line"],["env_id","buffer_epochs"],aggfunc=lambda v:f"{iqm(v.to_numpy()):.0f} ({len(v)})",sort=False).to_string())
