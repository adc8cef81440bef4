// Parallel loops on a small pool: every index once, whoever does it, whatever the pool does.
#include "../cpu/parallel.h"

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

using namespace anyprec::cpu;

namespace {

int passed = 0, failed = 0;

void check(bool ok, const char* what) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("FAILED %s\n", what);
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
    }
    ready_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  void schedule(std::function<void()> fn) {
    {
      std::lock_guard lock(mutex_);
      queue_.push_back(std::move(fn));
    }
    ready_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock lock(mutex_);
      ready_.wait(lock, [this] { return closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      auto fn = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      fn();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
  bool closed_ = false;
};

// Runs a loop and says whether each index was done exactly once.
bool once(Pool& pool, WaitingRoom* room, int64_t count, int64_t threads) {
  std::vector<std::atomic<int>> times(count);
  parallel_for(
      count, threads, room, [&](auto fn) { pool.schedule(std::move(fn)); },
      [&](int64_t i) { ++times[i]; });
  for (auto& n : times) {
    if (n != 1) return false;
  }
  return true;
}

void test_counts(Pool& pool, WaitingRoom* room) {
  bool all = true;
  for (int round = 0; round < 300; ++round) {
    for (int64_t count : {0, 1, 2, 3, 17, 100}) all &= once(pool, room, count, 3);
  }
  check(all, room ? "each index once, with a room" : "each index once");
}

// Many callers share a pool and a room.
void test_callers(Pool& pool, WaitingRoom& room) {
  std::atomic<bool> all = true;
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        if (!once(pool, &room, 16, 3)) all = false;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  check(all, "each index once, with four callers");
}

// After a loop, its helper waits for work.
void test_waiting_thread_is_used() {
  WaitingRoom room;
  Pool pool(1);
  bool used = false;
  auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!used && std::chrono::steady_clock::now() < end) {
    used = room.hand_over([] {});
    once(pool, &room, 8, 2);
  }
  check(used, "a helper waits after a loop");
}

// Nobody runs what is scheduled.
void test_no_help() {
  WaitingRoom room;
  std::vector<std::function<void()>> late;
  int64_t sum = 0;
  parallel_for(
      10, 4, &room, [&](auto fn) { late.emplace_back(std::move(fn)); }, [&](int64_t i) { sum += i; });
  check(sum == 45, "a loop without help ends");
  for (auto& fn : late) fn();  // finds no index left
  check(sum == 45, "late helpers do nothing");
}

}  // namespace

int main() {
  {
    WaitingRoom room;  // outlives the pool's threads, which may wait in it
    Pool pool(3);
    test_counts(pool, nullptr);
    test_counts(pool, &room);
    test_callers(pool, room);
  }
  test_waiting_thread_is_used();
  test_no_help();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
