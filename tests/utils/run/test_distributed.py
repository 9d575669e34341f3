from utils.run import distributed


def test_without_torchrun_nothing_is_shared():
    assert (distributed.size(), distributed.rank(), distributed.local_size()) == (1, 0, 1)
    assert distributed.on_rank0(lambda: 7) == 7 and distributed.all_reduce_max(3) == 3
    assert distributed.gather("x") == ["x"]
    assert distributed.deal(range(3)) == [(0, 1, 2)] and distributed.share([4, 5]) == [4, 5]
    team, own = distributed.form_teams(4)
    assert team is distributed.ALONE and team.part(9) == (0, 9) and list(own) == [0, 1, 2, 3]
    parts = [distributed.Team(position, 4).part(10) for position in range(4)]
    assert parts == [(0, 2), (2, 5), (5, 7), (7, 10)]
