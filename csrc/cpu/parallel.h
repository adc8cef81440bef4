// A parallel loop that runs on any pool: the caller takes part, and waits for claimed work only.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

namespace anyprec::cpu {

// Tells the processor that this thread only waits.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that have done their part of a brief loop wait here, awake, for the next: a product for
// one token takes less time than waking a thread does. They give up after kStay, about the time
// between two products of a decoder, and are the pool's again.
//
// A seat is free (null), or a thread waits in it (waiting()), or holds work for that thread, who
// owns it. Work in a seat whose thread is gone, after fork(), is never run: no loop relies on help.
class WaitingRoom {
 public:
  using Work = std::function<void()>;

  // Gives `work` to a thread that waits; false if none does.
  bool hand_over(const Work& work) {
    for (Seat& seat : seats_) {
      if (seat.content.load(std::memory_order_relaxed) != waiting()) continue;
      auto own = std::make_unique<Work>(work);
      Work* expected = waiting();
      if (seat.content.compare_exchange_strong(expected, own.get())) {
        own.release();
        return true;
      }
    }
    return false;
  }

  // Whether one more thread should be woken: not if so many are waking, who will come late to this
  // loop but in time for the next. Each that is woken arrives.
  bool call(int64_t enough) {
    if (waking_.load() >= enough) return false;
    ++waking_;
    return true;
  }
  void arrive() { --waking_; }

  // Waits in a free seat, if there is one, and does what is handed over.
  void stay() {
    for (Seat& seat : seats_) {
      Work* expected = nullptr;
      if (!seat.content.compare_exchange_strong(expected, waiting())) continue;
      while (await(seat)) {
        std::unique_ptr<Work> work(seat.content.load());
        (*work)();
        work.reset();
        seat.content.store(waiting());
      }
      return;
    }
  }

 private:
  static constexpr int kSeats = 64;
  static constexpr std::chrono::microseconds kStay{100};

  struct alignas(64) Seat {
    std::atomic<Work*> content{nullptr};
  };

  // An address that is no work's.
  Work* waiting() { return reinterpret_cast<Work*>(this); }

  // True when there is work in the seat; false, and the seat free, if none came in time.
  bool await(Seat& seat) {
    auto end = std::chrono::steady_clock::now() + kStay;
    while (seat.content.load(std::memory_order_acquire) == waiting()) {
      pause();
      if (std::chrono::steady_clock::now() < end) continue;
      Work* expected = waiting();
      return !seat.content.compare_exchange_strong(expected, nullptr);
    }
    return true;
  }

  Seat seats_[kSeats];
  std::atomic<int64_t> waking_{0};
};

constexpr int kPauses = 1000;  // tens of microseconds

// Calls body(i) for each i in 0..count. `schedule(fn)` hands fn to a pool with `threads` threads;
// the loop finishes even if the pool never runs it, so nested and concurrent loops can't deadlock.
// Helpers that start late find no index left and return without touching `body`. Helpers of a loop
// with a room wait there for another afterwards.
template <typename Schedule, typename Body>
void parallel_for(int64_t count, int64_t threads, WaitingRoom* room, Schedule&& schedule,
                  const Body& body) {
  if (count <= 1 || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  WaitingRoom::Work work = [state, count, &body] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      body(i);
      if (state->done.fetch_add(1) + 1 == count) state->done.notify_one();
    }
  };
  int64_t helpers = (threads < count ? threads : count) - 1;
  for (int64_t t = 0; t < helpers; ++t) {
    if (room == nullptr) {
      schedule(work);
    } else if (!room->hand_over(work) && room->call(helpers)) {
      schedule([work, room] {
        room->arrive();
        work();
        room->stay();
      });
    }
  }
  work();
  // What is left of a brief loop is done before this thread could sleep and be woken.
  for (int i = 0; room != nullptr && i < kPauses && state->done.load() < count; ++i) pause();
  for (int64_t done; (done = state->done.load()) < count;) state->done.wait(done);
}

}  // namespace anyprec::cpu
