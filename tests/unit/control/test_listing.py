"""Lists: what each page shows, when the other members are asked, and what is made ahead."""

import asyncio

import pytest
from prism.sandbox.v1 import sandbox_pb2

from prism_common.errors import InvalidArgumentError
from prism_control.api import listing
from prism_control.api.listing import Listing
from prism_control.state import commands
from prism_control.state.machine import Machine
from tests.unit.state.builders import create


class Member:
    """A member's state, and how often the others had to confirm that it is fresh."""

    def __init__(self, count: int) -> None:
        self.machine = Machine()
        self.confirmed = 0
        self.listing = Listing(lambda: self.machine)
        for number in range(count):
            self.add(number)

    def add(self, number: int) -> None:
        index = self.machine.applied_index + 1
        item = create(f"sb-{number}", name=f"name-{number}")
        self.machine.apply(index, commands.Proposal(1, 1000 + index, (item,)))

    async def fresh(self) -> Machine:
        self.confirmed += 1
        return self.machine

    async def page(self, token: str = "", size: int = 2) -> sandbox_pb2.ListSandboxesResponse:
        request = sandbox_pb2.ListSandboxesRequest(page_size=size, page_token=token)
        data = await self.listing.page(request, self.fresh)
        await asyncio.sleep(0)  # what is read ahead is made in the loop's next turn
        return sandbox_pb2.ListSandboxesResponse.FromString(data)


def ids(page: sandbox_pb2.ListSandboxesResponse) -> list[str]:
    return [sandbox.id for sandbox in page.sandboxes]


async def test_only_the_first_page_asks_the_others() -> None:
    member = Member(7)
    page = await member.page()
    found = ids(page)
    while page.next_page_token:
        page = await member.page(page.next_page_token)
        found += ids(page)
    assert found == [f"sb-{number}" for number in range(7)]
    assert member.confirmed == 1


async def test_member_behind_the_first_page_asks_the_others() -> None:
    token = (await Member(7).page()).next_page_token
    behind = Member(6)
    await behind.page(token)
    assert behind.confirmed == 1


async def test_token_of_an_earlier_release_asks_the_others() -> None:
    member = Member(4)
    assert ids(await member.page("AAAAAAAAAAI")) == ["sb-2", "sb-3"]
    assert member.confirmed == 1


async def test_page_that_was_made_ahead_is_not_shown_once_something_has_changed() -> None:
    member = Member(6)
    second = await member.page((await member.page()).next_page_token)
    assert member.listing._ahead, "nothing was made ahead"
    member.add(6)
    third = await member.page(second.next_page_token, size=2)
    assert (ids(third), third.revision) == (["sb-4", "sb-5"], 7)
    assert ids(await member.page(third.next_page_token)) == ["sb-6"]


async def test_page_that_was_made_ahead_is_for_the_same_list_only() -> None:
    member = Member(8)
    second = await member.page((await member.page()).next_page_token)
    assert len(ids(await member.page(second.next_page_token, size=3))) == 3


async def test_nothing_is_made_ahead_while_the_state_changes() -> None:
    member = Member(6)
    token = (await member.page()).next_page_token
    member.add(6)
    await member.page(token)
    assert not member.listing._ahead


async def test_pages_that_nobody_asks_for_are_few() -> None:
    member = Member(40)
    for size in range(1, 11):
        await member.page((await member.page(size=size)).next_page_token, size=size)
    assert len(member.listing._ahead) == listing._AHEAD_MAX


async def test_state_that_is_none_is_refused_by_its_field() -> None:
    request = sandbox_pb2.ListSandboxesRequest()
    request.states.append(77)  # type: ignore[arg-type]
    member = Member(0)
    with pytest.raises(InvalidArgumentError) as caught:
        await member.listing.page(request, member.fresh)
    assert caught.value.field == "states"
