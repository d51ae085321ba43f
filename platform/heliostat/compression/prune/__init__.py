"""Ways to prune a trained network.

`masks` sets single weights to zero and leaves every shape as it is: the file compresses, but no dense kernel is faster.
`structured` removes whole channels, together with everything that depends on them, and `heads` whole attention heads,
so that the network really gets smaller. `penalty` makes a training sparse beforehand, by itself.
"""
