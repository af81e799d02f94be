q.doc == k.doc
head.doc == 3
