"""Rewrap paragraphs and items that have a line over 120; python wrap.py FILE..."""
import re,sys,textwrap
for f in sys.argv[1:]:
    lines=open(f).read().split("\n"); out=[]; i=0; code=False
    while i<len(lines):
        l=lines[i]
        if l.startswith("```"): code=not code
        if code or not l.strip() or re.match(r"[|#<!]|```",l): out.append(l); i+=1; continue
        j=i+1
        while j<len(lines) and lines[j].strip() and not re.match(r"[|#<!]|```|\s*- |\d+\. ",lines[j]): j+=1
        par=lines[i:j]
        generated=out and out[-1].startswith("<!--") 
        if max(map(len,par))>120 and not generated:
            m=re.match(r"(\s*)(- |\d+\. )?",par[0]); first=m[0]; rest=" "*len(first)
            text=" ".join(p.strip() for p in par)
            if m[2]: text=text[len(m[2]):]
            par=textwrap.wrap(text,120,initial_indent=first,subsequent_indent=rest,break_long_words=False,break_on_hyphens=False)
        out+=par; i=j
    open(f,"w").write("\n".join(out))
