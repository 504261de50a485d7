from benchmark import tuning as t
r=t.results(); b=t.before_the_last()
for m in t.METHODS:
    o=t.ranking(r[r.method==m]); print(m, len(r[r.method==m]))
    print(o.head(6).to_string())
    for k in (None,1,8):
        f=t.choice(m,k); print('   K',k,t.words(f),'EDGE' if t.at_an_edge(m,f) else '')
for m in t.METHODS:
    for u in ('action','dimension'):
        print(m,u,t.words(t.choice(m,ratio=u)))
