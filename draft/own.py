import pandas as pd
from benchmark import tuning as t
from benchmark.measurements import measure
from benchmark.experiments import *
r=t.results()
import numpy as np
tab=measure(t.of_finalists(t.SEEDS[1:]))
st=measure(EXPERIMENTS["staleness"]()).dropna(subset="value")
for m in ("gipo","clip","tis","decoupled","plain_is","sapo"):
    f=t.words(t.choice(m))
    a=tab[(tab.method==m)&(tab.line==f)]
    b=st[(st.line==name(m))&(st.buffer_epochs<10)]
    print(m)
    for k in (1,8):
        for e in t.TASKS:
            x=a[(a.env_id==e)&(a.buffer_epochs==k)].value.round().astype(int).tolist()
            y=b[(b.env_id==e)&(b.buffer_epochs==k)].value.round().astype(int).tolist()
            print(f"  K={k} {e[:6]}", x, int(np.mean(x)), "|", y, int(np.mean(y)) if y else "")
